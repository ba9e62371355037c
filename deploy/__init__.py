"""Operating the server: dashboards, alerts, load."""
