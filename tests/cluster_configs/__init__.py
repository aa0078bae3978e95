"""Every deployment file against the schema or tool that will read it."""
