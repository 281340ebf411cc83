"""The grid's page: one HTML file that loads nothing, and the same figures as PNG and SVG."""
