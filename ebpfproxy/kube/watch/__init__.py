"""List and watch: keeps one resource of the API server up to date through everything that fails."""
