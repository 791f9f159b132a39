// Closes what target_begin.h opened. The macros stay defined: a source is compiled for one target.

}  // namespace TARGET
}  // namespace regatta

#if REGISTER_BYTES > 0
REGATTA_POP_TARGET
#endif
