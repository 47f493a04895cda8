"""Model runtimes behind one Protocol, the catalogue, downloads, and chat templates."""
