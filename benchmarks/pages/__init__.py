"""Fill the tables of the documentation from committed results, and draw its figures.

A page is Markdown, in which a marker names a table of `TABLES` (`generate.py`) and its settings::

    <!-- table: by_data
    study = "contest"
    columns = ["accuracy", "speed-up"]
    -->

    <!-- end -->

`python -m benchmarks.pages.generate` writes the table between the two comments, in every page of
`docs/` and in the README, and writes the pages that list settings, adapters and the like.
`python -m benchmarks.pages.figures` draws the pictures in `docs/figures`.
"""
