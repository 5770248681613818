"""Opens untrusted models and data: files are checked before they are read, and code runs only with the user's
consent.
"""
