"""Grafana dashboards, written from one description."""
