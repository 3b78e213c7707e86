"""Routers side by side on the digits: same base model, same data, same steps."""
