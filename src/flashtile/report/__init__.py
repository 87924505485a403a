"""One self-contained HTML page from results files; needs the packages of the ``bench`` extra."""
