"""What the three labs share. Flat: one subject a module, nothing imported until it is asked for."""
