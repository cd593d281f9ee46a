"""The methods: their maths and their settings."""
