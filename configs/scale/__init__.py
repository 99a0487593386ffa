"""Transformers beyond one device, for launch.plan and for whoever has the devices and the text; nothing here has been trained."""
