"""One file per model library: where its blocks are, what they are called, what pools."""
