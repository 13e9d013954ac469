"""State groups to Flower records and back."""

#: Name of a message's record that holds its typed body.
BODY = "photon"
