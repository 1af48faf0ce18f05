"""A load test's results as HTML pages with SVG charts."""
