"""One file per op: schema, fake, public function, checks, registration."""
