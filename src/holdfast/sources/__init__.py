"""Open untrusted models and data safely: files are checked before they are read, and code runs only with consent."""
