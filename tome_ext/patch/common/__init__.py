"""What every patch shares. Nothing here knows a model library."""
