"""The network with a trojan, and the photos with triggers."""
