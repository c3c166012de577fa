"""The front door: Ray Serve and FastAPI. Holds no job state."""
