"""Module tests; a package, so that its conftest and the scene tests' do not share a name."""
