"""The part of pg_background that runs inside the server, as PL/Python.

One job per module; none but `server` touches the server's own `plpy`, so all others can be imported and
tested outside of a server.
"""
