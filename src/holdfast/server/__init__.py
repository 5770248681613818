"""A guarded model over HTTP: the guard, the server, and the proxy."""
