"""The studio: a page in the browser, and an HTTP API, over the same inference as the command line."""
