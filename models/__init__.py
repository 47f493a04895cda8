"""Model runtimes behind one Protocol, the catalog, downloads, and chat templates."""
