"""One file an op: schema, fake, public function, checks, registration."""
