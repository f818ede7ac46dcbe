"""A page for a browser: requests and their queue, checks of uploads, metrics, the layout and the server."""
