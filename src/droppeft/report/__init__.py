"""What is shown to people: terminal output, HTML pages and figures."""
