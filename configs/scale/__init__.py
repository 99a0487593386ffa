"""Transformers beyond one device, for launch.plan and for who has the devices; nothing here has been trained."""
