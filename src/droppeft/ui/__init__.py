"""Pages in the browser, made with gradio: runs while they go on, and a model to try."""
