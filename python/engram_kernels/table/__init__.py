"""Tables: where rows rest (memory, memory shared by processes, files) and how files are written."""
