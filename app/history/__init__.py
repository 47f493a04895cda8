"""The conversations of the chat, on disk."""
