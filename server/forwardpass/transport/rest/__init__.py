"""The HTTP port: the Open Inference Protocol's REST form, on uvicorn's connections and starlette's routes."""
