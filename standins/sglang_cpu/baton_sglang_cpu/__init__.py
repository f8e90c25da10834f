"""What SGLang lacks on a machine without a GPU; the package's README.md says why, part by part."""
