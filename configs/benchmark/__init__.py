"""Shapes whose speed is measured, by launch.benchmark and launch.suite; nothing here is tuned to learn well."""
