"""Archives: folders, tar and zip files."""
