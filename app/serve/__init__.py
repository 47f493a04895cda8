"""The server: a socket, HTTP, and the APIs that clients know."""
