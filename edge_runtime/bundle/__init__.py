"""What is shipped: manifest, archive, lint and the making of bundles."""
