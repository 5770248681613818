"""Opens data: files, tables, images, arrays and loaders."""
