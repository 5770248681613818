"""Opening models and data of strangers safely: files are judged before they are read, and code runs only when named."""
