"""Opens models and data that may be untrusted: files are checked before they are read, and their code runs only with
the user's consent.
"""
