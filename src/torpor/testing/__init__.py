"""What tests, the demo and users' own tests run against: a scripted model server, a simulator, a fake clock."""
