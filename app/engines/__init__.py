"""The engine adapters: each turns one inference engine into the few methods that the rest of Baton calls."""
