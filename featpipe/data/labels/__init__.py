"""Labels from tables, sidecar files and folders."""
