"""What is trained and what is served: networks, policy, preprocessing, bundles."""
