"""Examples small enough to read in one sitting."""
