"""The Ray Serve deployments: the only code of Baton, besides its command line, that knows Ray."""
