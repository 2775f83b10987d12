"""What a release needs: locks, an audit, a bill of materials, the tests of old and new versions."""
