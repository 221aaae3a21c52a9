"""Send what a run made to a folder, to any file system of fsspec, or to the hub."""
