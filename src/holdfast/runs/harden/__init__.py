"""The steps of a hardening."""
