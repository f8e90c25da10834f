"""The one connection between a frontend and a replica: its messages and both of its ends."""
