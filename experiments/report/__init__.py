"""`frcnn report`: folders of runs as tables and as a page."""
