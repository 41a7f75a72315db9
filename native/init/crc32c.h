/* CRC32C (Castagnoli), as in iSCSI: reflected, initial value and final XOR are all ones. */
#ifndef TORPOR_CRC32C_H
#define TORPOR_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Must be called once before crc32c. */
void crc32c_init(void);
uint32_t crc32c(const uint8_t *data, size_t len);

#endif
