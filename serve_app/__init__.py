"""The front door, on Ray Serve and FastAPI. It holds no job state."""
